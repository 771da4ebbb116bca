"""The four services. They share code only through `shared`, rows never, and talk only through RabbitMQ."""
