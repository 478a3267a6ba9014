"""Policy adapters: what piRL needs to know about a flow-matching policy."""
