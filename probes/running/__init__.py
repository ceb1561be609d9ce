"""Statistics of a stream: each has `add`, `merge`, `value`, `state_dict` and `load_state_dict`.

Any split of the data, added and merged in any order, gives the same value: moments within 1e-12 relative, all else
bit for bit. All take finite values only; NaN and infinities are counted by `Histogram`.
"""
