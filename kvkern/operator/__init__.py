"""The Kubernetes operator: what a KVCache asks for, the objects that it becomes, and the loop that keeps them so.

    a KVCache as users write it -> forms/ -> KVCache -> objects/ -> objects of the API -> reconcile -> an API server

Everything up to `objects/` is pure: no cluster, no clock, no package that only an operator needs.
"""
