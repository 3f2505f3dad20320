def estimate(*a, **k):
    return {"total": 0.0}
