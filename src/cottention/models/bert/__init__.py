"""BERT with cosine or softmax attention."""
