"""From an error text to its cause: parsed by grammar, reasoned by arithmetic on the model's numbers. Needs no torch."""
