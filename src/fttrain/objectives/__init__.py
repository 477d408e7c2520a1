"""Objectives: pure functions of tensors. B batch, N chosen tokens, T tokens, V vocabulary, D width."""
