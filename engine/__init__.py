"""Tokens in, tokens out: llama.cpp in a process of its own."""
