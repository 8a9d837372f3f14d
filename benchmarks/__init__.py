"""Speed of lq against named peers: same commit, same file, same threads, alternating runs."""
