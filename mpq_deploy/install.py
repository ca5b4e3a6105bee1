"""Install a package on a device: ``python -m mpq_deploy.install model.mpq.tar`` (``device.installer``)."""

from __future__ import annotations

import sys

from mpq_deploy.device.installer import main

if __name__ == "__main__":
    sys.exit(main())
