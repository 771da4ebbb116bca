"""What two services need, and no more. Nothing here imports a service."""
