"""An HTTP server that continues texts: OpenAI's interface over a batch that requests join."""
