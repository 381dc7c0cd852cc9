"""Registries as the OCI distribution specification has them: documents and blobs by digest, ranges of blobs, uploads that go on where they broke off.

`client` is what others use. Its errors are two: ImageError for what asking again does not change (not there, denied, wrong bytes), HostError for what it may
(no connection, 429, 5xx; details: `status`, `retry_after` in seconds where known).
"""
