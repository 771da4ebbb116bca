-- Heartbeats of many agents in turn; TOKENS names a file with "workspace token" lines.
local agents = {}
for line in io.lines(os.getenv("TOKENS")) do
  local name, token = string.match(line, "(%S+) (%S+)")
  table.insert(agents, {
    body = '{"workspace_id":"' .. name .. '","active_tasks":0,"max_concurrent_tasks":1,"uptime_seconds":100}',
    headers = {["Content-Type"] = "application/json", ["Authorization"] = "Bearer " .. token},
  })
end
local number = 0

function request()
  number = number % #agents + 1
  return wrk.format("POST", "/registry/heartbeat", agents[number].headers, agents[number].body)
end
