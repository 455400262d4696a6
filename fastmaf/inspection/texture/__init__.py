"""A translation-invariant density of textures: a masked autoregressive flow over local features at several scales."""
