"""HTTP: the OpenAI-compatible Litestar application."""
