"""`rule.step` on memory, for adapters: compiled by Numba (`cpu`, `sixteen_bits`), or as calls with outputs (`calls`).

Import each module by its name, where its dependencies are installed; `import acprop_core` imports none of them.
"""
