-- +goose Up
-- As the tables of SQLite; see there. Texts are compared by their bytes, so that IDs sort as they are made.
CREATE TABLE job (
    id        TEXT   COLLATE "C" PRIMARY KEY,
    name      TEXT   COLLATE "C" NOT NULL,
    key       TEXT   COLLATE "C" NOT NULL,
    submitter TEXT   COLLATE "C" NOT NULL,
    bundle    TEXT   COLLATE "C" NOT NULL,
    state     TEXT   COLLATE "C" NOT NULL,
    reason    TEXT   NOT NULL,
    cause     TEXT   NOT NULL,
    spec      TEXT   NOT NULL,
    created   BIGINT NOT NULL,
    started   BIGINT NOT NULL,
    ended     BIGINT NOT NULL,
    priority  BIGINT NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX job_key ON job (submitter, key) WHERE key <> '';
CREATE INDEX job_state ON job (state, id);
CREATE INDEX job_submitter ON job (submitter, id);
CREATE INDEX job_name ON job (name, id);
CREATE INDEX job_bundle ON job (bundle);

CREATE TABLE party (
    job     TEXT   COLLATE "C" NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    pos     BIGINT NOT NULL,
    name    TEXT   COLLATE "C" NOT NULL,
    state   TEXT   COLLATE "C" NOT NULL,
    reason  TEXT   NOT NULL,
    cause   TEXT   NOT NULL,
    updated BIGINT NOT NULL,
    attempt BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (job, name)
);

CREATE TABLE event (
    seq       BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job       TEXT   COLLATE "C" NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    at        BIGINT NOT NULL,
    party     TEXT   COLLATE "C" NOT NULL,
    party_seq BIGINT NOT NULL,
    kind      TEXT   COLLATE "C" NOT NULL,
    body      TEXT   NOT NULL
);
CREATE INDEX event_job ON event (job, seq);
CREATE UNIQUE INDEX event_once ON event (job, party, party_seq) WHERE party_seq > 0;

CREATE TABLE bundle (
    digest  TEXT   COLLATE "C" PRIMARY KEY,
    size    BIGINT NOT NULL,
    created BIGINT NOT NULL
);

CREATE TABLE identity (
    kind     TEXT   COLLATE "C" NOT NULL,
    name     TEXT   COLLATE "C" NOT NULL,
    enrolled BIGINT NOT NULL,
    removed  BIGINT NOT NULL,
    drained  BIGINT NOT NULL,
    info     TEXT   NOT NULL,
    seen     BIGINT NOT NULL,
    version  TEXT   NOT NULL,
    PRIMARY KEY (kind, name)
);

CREATE TABLE token (
    hash    TEXT   COLLATE "C" PRIMARY KEY,
    kind    TEXT   COLLATE "C" NOT NULL,
    name    TEXT   COLLATE "C" NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    used    BIGINT NOT NULL,
    made_by TEXT   NOT NULL
);

CREATE TABLE lease (
    job   TEXT   COLLATE "C" PRIMARY KEY REFERENCES job (id) ON DELETE CASCADE,
    owner TEXT   COLLATE "C" NOT NULL,
    until BIGINT NOT NULL
);

-- +goose Down
DROP TABLE lease;
DROP TABLE token;
DROP TABLE identity;
DROP TABLE bundle;
DROP TABLE event;
DROP TABLE party;
DROP TABLE job;
