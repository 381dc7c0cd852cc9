"""how much memory a snapshot holds, and how much the machine gave back before"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_OF_SNAPSHOTS = ("saved", "slimmed")


def upgrade() -> None:
    for name in _OF_SNAPSHOTS:
        op.add_column("snapshots", sa.Column(name, sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    for name in _OF_SNAPSHOTS:
        op.drop_column("snapshots", name)
