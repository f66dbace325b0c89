-- +goose Up
-- As in SQLite; see there.
ALTER TABLE party ADD COLUMN allocated BIGINT NOT NULL DEFAULT 0;
UPDATE party SET allocated = 1 WHERE pos > 0 AND job IN (SELECT id FROM job WHERE state IN ('preparing', 'running', 'stopping'));
CREATE INDEX job_ended ON job (ended) WHERE ended > 0;

CREATE TABLE duty (
    name  TEXT   COLLATE "C" PRIMARY KEY,
    owner TEXT   COLLATE "C" NOT NULL,
    until BIGINT NOT NULL
);

-- +goose Down
DROP TABLE duty;
DROP INDEX job_ended;
ALTER TABLE party DROP COLUMN allocated;
