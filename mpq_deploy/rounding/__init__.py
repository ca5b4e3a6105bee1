"""Codes and scales of weights: error search, GPTQ, refinement, and the Hessians behind them."""
