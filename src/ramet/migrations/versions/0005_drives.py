"""the layers of the drives of a snapshot"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("snapshots", sa.Column("drive_layers", sa.Text, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("snapshots", "drive_layers")
