"""Where models come from: the hub, package indexes, this machine's files."""
