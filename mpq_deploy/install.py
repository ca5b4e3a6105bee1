"""Install a package on a device: ``python -m mpq_deploy.install model.mpq.tar``. See ``mpq_deploy.device.install``."""

from __future__ import annotations

import sys

from mpq_deploy.device.install import main

if __name__ == "__main__":
    sys.exit(main())
