-- +goose Up
-- 1 = the job holds what it asks for at that site. It counts until the party is over.
ALTER TABLE party ADD COLUMN allocated INTEGER NOT NULL DEFAULT 0;
UPDATE party SET allocated = 1 WHERE pos > 0 AND job IN (SELECT id FROM job WHERE state IN ('preparing', 'running', 'stopping'));
CREATE INDEX job_ended ON job (ended) WHERE ended > 0;

-- Which hub does what one alone may do, and until when.
CREATE TABLE duty (
    name  TEXT    PRIMARY KEY,
    owner TEXT    NOT NULL,
    until INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- +goose Down
DROP TABLE duty;
DROP INDEX job_ended;
ALTER TABLE party DROP COLUMN allocated;
