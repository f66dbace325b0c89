-- +goose Up
-- How often a party has begun anew.
ALTER TABLE party ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0;

-- +goose Down
ALTER TABLE party DROP COLUMN attempt;
