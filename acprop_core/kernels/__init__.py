"""`rule.step` on memory, for adapters: compiled by Numba (`cpu`, `sixteen_bits`), or as calls with outputs (`calls`).

Each module is imported by its name, where what it needs is installed; `import acprop_core` imports none of them.
"""
