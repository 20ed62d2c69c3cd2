"""The worker process: takes pictures from the server and works on them, until SIGTERM. Run as many as you like."""

import asyncio
import logging
import os

from tasks import component_at

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(component_at(os.environ["TEMPORAL_ADDRESS"]).run())
