"""Erasure: `reach` says what has to go, `machine` carries it through, `removal` deletes, `proof` searches what is left."""
