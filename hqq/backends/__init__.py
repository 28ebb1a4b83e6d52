"""How a layer multiplies: one file per backend, each imported only when it is asked for."""
