"""The plugin module starts a thread."""

import threading
import time

from mutants.plugins.good import *  # noqa: F403

KILLS = "A5"
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
