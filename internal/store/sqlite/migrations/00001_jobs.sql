-- +goose Up
-- Times are Unix nanoseconds, 0 where there is none. Causes and specs are JSON.
CREATE TABLE job (
    id        TEXT    PRIMARY KEY,
    name      TEXT    NOT NULL,
    key       TEXT    NOT NULL,
    submitter TEXT    NOT NULL,
    bundle    TEXT    NOT NULL,
    state     TEXT    NOT NULL,
    reason    TEXT    NOT NULL,
    cause     TEXT    NOT NULL,
    spec      TEXT    NOT NULL,
    created   INTEGER NOT NULL,
    started   INTEGER NOT NULL,
    ended     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
-- A key belongs to its submitter: nobody gets another's job by guessing.
CREATE UNIQUE INDEX job_key ON job (submitter, key) WHERE key <> '';
CREATE INDEX job_state ON job (state, id);

CREATE TABLE party (
    job     TEXT    NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    pos     INTEGER NOT NULL, -- 0 = the hub; sites in the order of their partitions
    name    TEXT    NOT NULL,
    state   TEXT    NOT NULL,
    reason  TEXT    NOT NULL,
    cause   TEXT    NOT NULL,
    updated INTEGER NOT NULL,
    PRIMARY KEY (job, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE event (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT, -- never given twice, also after the newest was deleted
    job       TEXT    NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    at        INTEGER NOT NULL,
    party     TEXT    NOT NULL,
    party_seq INTEGER NOT NULL, -- the party's own count of its reports; 0 = not a report
    kind      TEXT    NOT NULL,
    body      TEXT    NOT NULL
) STRICT;
CREATE INDEX event_job ON event (job, seq);
CREATE UNIQUE INDEX event_once ON event (job, party, party_seq) WHERE party_seq > 0;

CREATE TABLE bundle (
    digest  TEXT    PRIMARY KEY,
    size    INTEGER NOT NULL,
    created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- +goose Down
DROP TABLE bundle;
DROP TABLE event;
DROP TABLE party;
DROP TABLE job;
