"""From weights on disk to a policy: loading, adapter, backbone and head."""
