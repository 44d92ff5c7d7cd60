PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE migrations (version INTEGER PRIMARY KEY);
INSERT INTO migrations VALUES(1);
CREATE TABLE accounts (
        id INTEGER PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('cash', 'revenue', 'wallet', 'held')),
        customer TEXT NOT NULL,
        -- projection of SUM(entries.nano_usd), kept by the trigger below; only the cash boundary may be negative
        balance_nano INTEGER NOT NULL DEFAULT 0 CHECK (kind = 'cash' OR balance_nano >= 0),
        UNIQUE (kind, customer)
    );
INSERT INTO accounts VALUES(1,'cash','',-6000000);
INSERT INTO accounts VALUES(2,'revenue','',107100);
INSERT INTO accounts VALUES(3,'wallet','ann',4772900);
INSERT INTO accounts VALUES(4,'held','ann',153000);
INSERT INTO accounts VALUES(5,'wallet','bob',967000);
INSERT INTO accounts VALUES(6,'held','bob',0);
CREATE TABLE transactions (
        id INTEGER PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('topup', 'hold', 'settle', 'release')),
        reference TEXT NOT NULL,  -- request id, or the payment's id for a top-up
        created REAL NOT NULL,
        UNIQUE (kind, reference)
    );
INSERT INTO transactions VALUES(1,'topup','pay_1',1790000000.25);
INSERT INTO transactions VALUES(2,'topup','pay_2',1790000000.25);
INSERT INTO transactions VALUES(3,'hold','req_1',1790000001.7499999999);
INSERT INTO transactions VALUES(4,'hold','req_2',1790000003.2499999999);
INSERT INTO transactions VALUES(5,'settle','req_1',1790000003.2499999999);
INSERT INTO transactions VALUES(6,'release','req_2',1790000003.2499999999);
INSERT INTO transactions VALUES(7,'hold','req_3',1790000004.7499999999);
INSERT INTO transactions VALUES(8,'settle','req_3',1790000004.7499999999);
INSERT INTO transactions VALUES(9,'hold','req_4',1790000006.25);
CREATE TABLE entries (
        id INTEGER PRIMARY KEY,
        transaction_id INTEGER NOT NULL REFERENCES transactions (id),
        account_id INTEGER NOT NULL REFERENCES accounts (id),
        nano_usd INTEGER NOT NULL CHECK (typeof(nano_usd) = 'integer')
    );
INSERT INTO entries VALUES(1,1,1,-5000000);
INSERT INTO entries VALUES(2,1,3,5000000);
INSERT INTO entries VALUES(3,2,1,-1000000);
INSERT INTO entries VALUES(4,2,5,1000000);
INSERT INTO entries VALUES(5,3,3,-105000);
INSERT INTO entries VALUES(6,3,4,105000);
INSERT INTO entries VALUES(7,4,5,-102000);
INSERT INTO entries VALUES(8,4,6,102000);
INSERT INTO entries VALUES(9,5,4,-105000);
INSERT INTO entries VALUES(10,5,2,74100);
INSERT INTO entries VALUES(11,5,3,30900);
INSERT INTO entries VALUES(12,6,6,-102000);
INSERT INTO entries VALUES(13,6,5,102000);
INSERT INTO entries VALUES(14,7,5,-33000);
INSERT INTO entries VALUES(15,7,6,33000);
INSERT INTO entries VALUES(16,8,6,-33000);
INSERT INTO entries VALUES(17,8,2,33000);
INSERT INTO entries VALUES(18,8,5,0);
INSERT INTO entries VALUES(19,9,3,-153000);
INSERT INTO entries VALUES(20,9,4,153000);
CREATE TABLE holds (
        request_id TEXT PRIMARY KEY,
        customer TEXT NOT NULL,
        key_id TEXT NOT NULL,
        model TEXT NOT NULL,
        price_version TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL CHECK (prompt_tokens >= 0),
        max_tokens INTEGER NOT NULL CHECK (max_tokens >= 1),
        nano_usd INTEGER NOT NULL CHECK (nano_usd >= 0),
        state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'released')),
        created REAL NOT NULL,
        expires REAL NOT NULL
    );
INSERT INTO holds VALUES('req_1','ann','key_1','tide-nano','2026-11',100,50,105000,'settled',1790000001.7499999999,1790000601.75);
INSERT INTO holds VALUES('req_2','bob','key_1','tide-nano','2026-11',40,60,102000,'released',1790000003.2499999999,1790000603.2499999999);
INSERT INTO holds VALUES('req_3','bob','key_1','tide-nano','2026-11',10,20,33000,'settled',1790000004.7499999999,1790000604.7499999999);
INSERT INTO holds VALUES('req_4','ann','key_1','tide-nano','2026-11',10,100,153000,'open',1790000006.25,1790000606.25);
CREATE TABLE usage (
        request_id TEXT PRIMARY KEY REFERENCES holds (request_id),
        customer TEXT NOT NULL,
        key_id TEXT NOT NULL,
        model TEXT NOT NULL,
        price_version TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL CHECK (cached_tokens BETWEEN 0 AND prompt_tokens),
        completion_tokens INTEGER NOT NULL CHECK (completion_tokens >= 0),
        nano_usd INTEGER NOT NULL CHECK (nano_usd >= 0),
        finish_reason TEXT NOT NULL,
        created REAL NOT NULL
    );
INSERT INTO usage VALUES('req_1','ann','key_1','tide-nano','2026-11',100,20,33,74100,'stop',1790000003.2499999999);
INSERT INTO usage VALUES('req_3','bob','key_1','tide-nano','2026-11',10,0,20,33000,'length',1790000004.7499999999);
CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        hash TEXT NOT NULL UNIQUE,
        hint TEXT NOT NULL,
        customer TEXT NOT NULL,
        name TEXT NOT NULL,
        role TEXT NOT NULL CHECK (role IN ('user', 'admin')),
        training_consent INTEGER NOT NULL,
        may_grant INTEGER NOT NULL,
        created REAL NOT NULL,
        revoked REAL
    );
INSERT INTO keys VALUES('key_000285799b861e66','7af42b89f9a906cc58f3f048de4b4425cd7fc0a09802163a33b01203603f879a','sk-M7B…8PZE','ann','laptop','user',1,0,1795594748.5647079944,NULL);
INSERT INTO keys VALUES('key_8d3509be7038c878','2f7c4223073c433f9d70942bf435f1c010f3968f7272079cbdee811bb092af0f','sk-GGZ…knUQ','bob','laptop','user',0,0,1795594748.5695245265,NULL);
CREATE TABLE prices (
        version TEXT NOT NULL,
        model TEXT NOT NULL,
        input_nano INTEGER NOT NULL,
        cached_input_nano INTEGER NOT NULL,
        output_nano INTEGER NOT NULL,
        PRIMARY KEY (version, model)
    );
INSERT INTO prices VALUES('2026-11','tide-nano',300,30,1500);
CREATE INDEX entries_by_transaction ON entries (transaction_id);
CREATE TRIGGER entry_moves_balance AFTER INSERT ON entries BEGIN
        UPDATE accounts SET balance_nano = balance_nano + NEW.nano_usd WHERE id = NEW.account_id;
    END;
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries BEGIN
        SELECT RAISE(ABORT, 'ledger entries are append-only');
    END;
CREATE TRIGGER entries_never_leave BEFORE DELETE ON entries BEGIN
        SELECT RAISE(ABORT, 'ledger entries are append-only');
    END;
CREATE INDEX open_holds ON holds (expires) WHERE state = 'open';
COMMIT;
