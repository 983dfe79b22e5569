"""Masked multimodal pretraining: tokens, budgets, masks, objective, decoding."""
