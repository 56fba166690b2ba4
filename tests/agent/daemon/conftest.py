from tests.simulators.broker import embedded_broker

__all__ = ["embedded_broker"]
