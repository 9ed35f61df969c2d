"""A server that OpenAI's clients and users of llama-server can switch to."""
