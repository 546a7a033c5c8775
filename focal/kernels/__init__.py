"""Optional speed, reached only from an adapter: each kernel equals a plain formula of the core."""
