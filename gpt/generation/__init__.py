"""Generation: from logits to a token, from tokens to more tokens, from a prompt to text."""
