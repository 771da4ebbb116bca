"""A real PostgreSQL, a real RabbitMQ and the four services on one machine: `python -m deploy.local up`."""
