"""The packaged tiny base model, its depth network and its adapters: loading, and the recipes that made them."""
