"""A prompt file becomes chat messages: persona, rules, demonstrations."""
