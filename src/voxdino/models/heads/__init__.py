"""Heads that classify: how tokens are pooled, and what their logits mean."""
