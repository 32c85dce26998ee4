"""What a training step does, as data: below the networks that ask for it and the backends that run it."""
