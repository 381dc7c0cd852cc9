"""alembic's entry: run the migrations on the database that `ramet.db` names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

url = context.config.get_main_option("sqlalchemy.url")
assert url
engine = sa.create_engine(url, poolclass=sa.NullPool)  # nothing stays open when a migration fails
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
