def write(*a, **k):
    return []
