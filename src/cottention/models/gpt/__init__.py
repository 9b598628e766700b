"""GPT with cosine or softmax attention."""
