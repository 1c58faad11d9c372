"""Ray jobs: each reads a job, calls the library, and holds no mathematics."""
