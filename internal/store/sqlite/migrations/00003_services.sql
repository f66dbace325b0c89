-- +goose Up
-- What a job asks to be taken for before others; higher first.
ALTER TABLE job ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
CREATE INDEX job_submitter ON job (submitter, id);
CREATE INDEX job_name ON job (name, id);
CREATE INDEX job_bundle ON job (bundle);

CREATE TABLE identity (
    kind     TEXT    NOT NULL,
    name     TEXT    NOT NULL,
    enrolled INTEGER NOT NULL, -- 0 = never by a token: it stands in the hub's configuration
    removed  INTEGER NOT NULL, -- 0 = it may come
    drained  INTEGER NOT NULL, -- 1 = a site that takes no new jobs
    info     TEXT    NOT NULL, -- JSON: what a site declared last; '' = nothing yet
    seen     INTEGER NOT NULL,
    version  TEXT    NOT NULL, -- of its Pergola
    PRIMARY KEY (kind, name)
) STRICT, WITHOUT ROWID;

-- Of a token's secret there is but the hash: who reads the store cannot join with what stands in it.
CREATE TABLE token (
    hash    TEXT    PRIMARY KEY,
    kind    TEXT    NOT NULL,
    name    TEXT    NOT NULL,
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    used    INTEGER NOT NULL,
    made_by TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

-- Which hub sees to a job, and until when it alone may.
CREATE TABLE lease (
    job   TEXT    PRIMARY KEY REFERENCES job (id) ON DELETE CASCADE,
    owner TEXT    NOT NULL,
    until INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- +goose Down
DROP TABLE lease;
DROP TABLE token;
DROP TABLE identity;
DROP INDEX job_bundle;
DROP INDEX job_name;
DROP INDEX job_submitter;
ALTER TABLE job DROP COLUMN priority;
