"""The optional admission webhook: pods that ask for it get the socket's folder, variables and an image with kvkern in it.

inject         what to change in a pod: pure
review         an AdmissionReview's bytes -> its answer's: pure
known          the KVCaches that the operator has seen, so that an answer needs no call
certificates   CAs, serving certificates, and when which is used: no clock of its own
registration   what the API server is told of the webhook
keeper         writes certificates and registration, and takes what another replica has written
server         HTTPS
service        the parts together
"""
