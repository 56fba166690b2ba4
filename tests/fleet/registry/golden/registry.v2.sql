BEGIN TRANSACTION;
CREATE TABLE artifacts (
	digest VARCHAR(64) NOT NULL, 
	id VARCHAR(128) NOT NULL, 
	model VARCHAR NOT NULL, 
	toolchain VARCHAR NOT NULL, 
	precision VARCHAR NOT NULL, 
	target VARCHAR NOT NULL, 
	profile VARCHAR NOT NULL, 
	size INTEGER NOT NULL, 
	published_at DATETIME NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "artifacts" VALUES('abababababababababababababababababababababababababababababababab','sample-onnx_genai-int4-cpu-000000000000','sample','onnx_genai','int4','cpu','iot-x86',90000000,'2026-11-01 00:00:00.000000');
CREATE TABLE audit (
	id INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	who VARCHAR NOT NULL, 
	action VARCHAR NOT NULL, 
	subject VARCHAR NOT NULL, 
	details JSON, 
	PRIMARY KEY (id)
);
INSERT INTO "audit" VALUES(1,'2026-11-01 00:00:00.000000','tester','device.add','pi-1','{"profile": "iot-x86"}');
INSERT INTO "audit" VALUES(2,'2026-11-01 00:00:00.000000','tester','device.add','pi-2','{"profile": "iot-x86"}');
INSERT INTO "audit" VALUES(3,'2026-11-01 00:00:00.000000','tester','deployment.create','pi-1-1-20261101T000000','{"device": "pi-1", "artifact": "sample-onnx_genai-int4-cpu-000000000000", "sequence": 1}');
CREATE TABLE deployments (
	id VARCHAR(64) NOT NULL, 
	device VARCHAR(63) NOT NULL, 
	artifact VARCHAR(128) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	sequence INTEGER NOT NULL, 
	envelope BLOB NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	presumed BOOLEAN NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME NOT NULL, 
	deadline_s DOUBLE NOT NULL, 
	probation_s DOUBLE NOT NULL, 
	due_at DATETIME, 
	published_at DATETIME, 
	started_at DATETIME, 
	reported_at DATETIME, 
	finished_at DATETIME, 
	progress JSON, 
	proof JSON, 
	runtime VARCHAR, 
	endpoint VARCHAR, 
	served_digest VARCHAR(64), 
	failure_code VARCHAR(64), 
	failure_message TEXT, 
	PRIMARY KEY (id), 
	UNIQUE (device, sequence), 
	FOREIGN KEY(device) REFERENCES devices (id), 
	FOREIGN KEY(digest) REFERENCES artifacts (digest)
);
INSERT INTO "deployments" VALUES('pi-1-1-20261101T000000','pi-1','sample-onnx_genai-int4-cpu-000000000000','abababababababababababababababababababababababababababababababab',1,X'7B227369676E6564223A226F72646572227D','committed',0,'2026-11-01 00:00:00.000000','2027-11-01 00:00:00.000000',21600.0,1.0,NULL,NULL,'2026-11-01 00:00:00.000000','2026-11-01 00:00:00.000000','2026-11-01 00:00:00.000000',NULL,NULL,NULL,NULL,'abababababababababababababababababababababababababababababababab',NULL,NULL);
CREATE TABLE devices (
	id VARCHAR(63) NOT NULL, 
	profile VARCHAR(63) NOT NULL, 
	profile_document JSON, 
	added_at DATETIME NOT NULL, 
	removed_at DATETIME, 
	cleared BOOLEAN NOT NULL, 
	sequence INTEGER NOT NULL, 
	online BOOLEAN NOT NULL, 
	presence_at DATETIME, 
	agent_version VARCHAR NOT NULL, 
	facts JSON, 
	reported JSON, 
	health JSON, 
	last_seen DATETIME, 
	malformed INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "devices" VALUES('pi-1','iot-x86',NULL,'2026-11-01 00:00:00.000000',NULL,0,1,1,'2026-11-01 00:00:00.000000','0.1.0',NULL,'{"version": 1, "device": "pi-1", "sequence": 1, "deployment": "pi-1-1-20261101T000000", "state": "committed", "desired": null, "digest": "abababababababababababababababababababababababababababababababab", "artifact": null, "runtime": null, "endpoint": null, "progress": null, "proof": null, "failure": null, "malformed_messages": 0, "paused": false, "at": "2026-11-01T00:00:00Z"}','{"version": 1, "device": "pi-1", "at": "2026-11-01T00:00:00Z", "window_s": 60.0, "digest": null, "requests": 3, "errors": 0, "ttft_ms_p50": 12.0, "ttft_ms_p95": null, "tpot_ms_p50": 13.0, "tpot_ms_p95": null, "tokens_per_s": 74.0, "worker_memory_bytes": 0, "worker_restarts": 0, "temperature_c": null, "throttled": null, "verdict": "unknown", "reason": ""}','2026-11-01 00:00:00.000000',0);
INSERT INTO "devices" VALUES('pi-2','iot-x86',NULL,'2026-11-01 00:00:00.000000',NULL,0,0,0,NULL,'',NULL,NULL,NULL,NULL,0);
CREATE TABLE health (
	id INTEGER NOT NULL, 
	device VARCHAR(63) NOT NULL, 
	at DATETIME NOT NULL, 
	report JSON NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(device) REFERENCES devices (id)
);
INSERT INTO "health" VALUES(1,'pi-1','2026-11-01 00:00:00.000000','{"version": 1, "device": "pi-1", "at": "2026-11-01T00:00:00Z", "window_s": 60.0, "digest": null, "requests": 3, "errors": 0, "ttft_ms_p50": 12.0, "ttft_ms_p95": null, "tpot_ms_p50": 13.0, "tpot_ms_p95": null, "tokens_per_s": 74.0, "worker_memory_bytes": 0, "worker_restarts": 0, "temperature_c": null, "throttled": null, "verdict": "unknown", "reason": ""}');
CREATE TABLE phifleet_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "phifleet_schema" VALUES(2);
CREATE INDEX ix_artifacts_id ON artifacts (id);
CREATE TRIGGER audit_no_update BEFORE update ON audit
BEGIN SELECT RAISE(ABORT, 'the audit is append only'); END;
CREATE TRIGGER audit_no_delete BEFORE delete ON audit
BEGIN SELECT RAISE(ABORT, 'the audit is append only'); END;
CREATE INDEX ix_deployments_due_at ON deployments (due_at);
CREATE INDEX deployments_by_stage ON deployments (stage);
CREATE INDEX ix_deployments_device ON deployments (device);
CREATE INDEX health_by_device ON health (device, id);
COMMIT;
