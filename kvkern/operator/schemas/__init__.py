"""OpenAPI schemas of the CRDs: types, limits, defaults. What they refuse never reaches the operator."""
