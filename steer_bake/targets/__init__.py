"""What a plan can be turned into: each file is one function from a plan to files at a path.

``<name>(plan, base, ref, out, *, recipe, stack, overwrite, progress)``: writes ``out`` completely or not at all.
"""
