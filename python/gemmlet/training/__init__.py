"""Training steps as data, below the backends that execute them and the networks that are made of them."""
